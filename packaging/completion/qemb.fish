# Completion of qemb and qemb-serve in fish. The program itself says what its options are
# (print_table in frontends/options.c), so the script fits every version.
function __qemb_complete --argument-names program
    set -l all
    $program --completion 2>/dev/null | while read -l -d \t kind name letter values commands help
        if test $kind = command
            set -a all $name
            continue
        end
        set -l options -c $program -l $name -d $help
        test $letter = -; or set -a options -s $letter
        switch $values
            case 'words *'
                set -a options -x -a (string replace 'words ' '' $values)
            case 'files *'
                set -l suffix (string replace 'files ' '' $values)
                set -a options -r -k -a "(__fish_complete_suffix '$suffix')"
            case folders
                set -a options -x -a '(__fish_complete_directories)'
            case any
                set -a options -x
        end
        if test $commands != -
            set -l ours (string split , $commands)
            set -l seen "__fish_seen_subcommand_from $ours"
            contains embed $ours; and set seen "$seen; or not __fish_seen_subcommand_from $all"
            set -a options -n $seen
        end
        complete $options
    end
    if test -n "$all"
        complete -c $program -n "not __fish_seen_subcommand_from $all" -f -a "$all"
    end
end
__qemb_complete (status basename | string replace .fish '')
