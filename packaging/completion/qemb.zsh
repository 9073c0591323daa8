#compdef qemb qemb-serve
# Completion of qemb and qemb-serve in zsh. The program itself says what its options are
# (print_table in frontends/options.c), so the script fits every version.
setopt local_options extended_glob
local kind name letter values commands help command action
local -a names specs
while IFS=$'\t' read -r kind name letter values commands help; do
    if [[ $kind == command ]]; then
        names+=($name)
        [[ -z $command && ${words[(ie)$name]} -lt $CURRENT ]] && command=$name
        continue
    fi
    [[ $commands == - || ,$commands, == *,${command:-embed},* ]] || continue
    help=${help//(#m)[\[\]:\\]/\\$MATCH}
    case $values in
    -) action= ;;
    words\ *) action=":value:(${values#words })" ;;
    files*) action=":file:_files -g '*${values#files }'" ;;
    folders) action=":folder:_files -/" ;;
    *) action=":value: " ;;
    esac
    if [[ $values == - ]]; then
        specs+=("--${name}[$help]")
    else
        specs+=("--${name}=[$help]$action")
    fi
    [[ $letter == - ]] || specs+=("-${letter}[$help]$action")
done < <(${~words[1]} --completion 2>/dev/null)
if [[ -n $names && -z $command ]]; then
    _arguments : $specs "1:command:($names)"
else
    _arguments : $specs '*:file:_files'
fi
