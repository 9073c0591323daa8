# Completion of qemb and qemb-serve in bash. The program itself says what its options are
# (print_table in frontends/options.c), so the script fits every version.

# Offers the files of the word $1 whose names end with $2, and folders.
_qemb_files() {
    local name
    compopt -o filenames
    mapfile -t COMPREPLY < <(compgen -d -- "$1")
    while IFS= read -r name; do
        [[ -d $name || $name != *"$2" ]] || COMPREPLY+=("$name")
    done < <(compgen -f -- "$1")
}

# Offers what option_values says for the word $1.
_qemb_values() {
    case $2 in
    words\ *) mapfile -t COMPREPLY < <(compgen -W "${2#words }" -- "$1") ;;
    files*) _qemb_files "$1" "${2#files }" ;;
    folders) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -d -- "$1") ;;
    esac
}

_qemb() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} command=
    local kind name letter values commands given fits
    local -a names=() offered=()
    COMPREPLY=()
    # readline makes a word of the = in --output=json
    if [[ $word == = ]]; then
        word=
    elif [[ $before == = ]]; then
        before=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    while IFS=$'\t' read -r kind name letter values commands _; do
        if [[ $kind == command ]]; then
            names+=("$name")
            for given in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
                [[ $command || $given != "$name" ]] || command=$name
            done
            continue
        fi
        fits=
        [[ $commands == - || ,$commands, == *,"${command:-embed}",* ]] && fits=1
        if [[ $before == "--$name" || $before == "-$letter" && $letter != - ]]; then
            # two rows may have one name: the one with a value is for its commands alone
            [[ $values == - || ! $fits ]] || { _qemb_values "$word" "$values"; return; }
        fi
        [[ ! $fits ]] || offered+=("--$name")
    done < <("${COMP_WORDS[0]/#\~/$HOME}" --completion 2>/dev/null)
    if [[ $word == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "${offered[*]}" -- "$word")
    elif [[ $command || ! ${names[*]} ]]; then
        _qemb_files "$word" ""
    else
        mapfile -t COMPREPLY < <(compgen -W "${names[*]}" -- "$word")
    fi
}
complete -F _qemb qemb qemb-serve
