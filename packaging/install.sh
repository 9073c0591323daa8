#!/bin/sh
# install.sh install|portable|uninstall - the files of install.list; the Makefile calls it.
#
# portable: the rows up to "---". A file is written under a temporary name in its directory and
# renamed, so a program that runs keeps the file that it runs from, and nobody sees a half. The
# environment has VERSION, SONAME, PREFIX, DESTDIR, INTO (the folder that PREFIX will be), STRIP (a
# command, or "true"), PROGRAMS (the folder of the programs) and, relative to PREFIX or absolute,
# LIBDIR, UNITDIR and ZSHDIR.
set -eu
action=$1
list=$(dirname "$0")/install.list
temporary=
trap 'rm -f "$temporary"' EXIT
trap 'exit 1' HUP INT TERM

fill() {
    awk 'function fill(name,    out, at) { # not gsub, which gives "&" a meaning
        while (at = index($0, "@" name "@")) {
            out = out substr($0, 1, at - 1) ENVIRON[name]
            $0 = substr($0, at + length(name) + 2)
        }
        $0 = out $0
    }
    { fill("PREFIX"); fill("LIBDIR"); fill("UNITDIR"); fill("ZSHDIR"); fill("VERSION")
      fill("SONAME"); print }'
}

destination() { # of a row, in the file system
    path=$(echo "$1" | fill)
    case $path in
    /*) echo "$DESTDIR$path" ;;
    *) echo "$INTO/$path" ;;
    esac
}

put() { # KIND SOURCE DESTINATION
    mode=644 source=$2
    mkdir -p "$(dirname "$3")"
    temporary=$(dirname "$3")/.$(basename "$3").$$
    if [ "$1" = program ]; then
        mode=755 source=$PROGRAMS/$2
    fi
    if [ "$1" = link ]; then
        ln -s "$(echo "$source" | fill)" "$temporary"
    else
        install -m "$mode" "$source" "$temporary"
    fi
    case $1 in
    program) $STRIP "$temporary" ;;
    library) $STRIP --strip-debug "$temporary" ;;
    text) fill <"$source" >"$temporary" ;;
    esac
    mv -fT "$temporary" "$3"
}

while read -r kind source to; do
    case $kind in
    '#'* | '') continue ;;
    ---) if [ "$action" = portable ]; then break; else continue; fi ;;
    esac
    to=$(destination "$to")
    if [ "$action" = uninstall ]; then
        rm -f "$to"
    else
        put "$kind" "$source" "$to"
    fi
done <"$list"
# The only folder that is qemb's own; others may be there for other programs.
[ "$action" != uninstall ] || rmdir "$INTO/share/qemb" 2>/dev/null || true
# The loader's cache of libraries; of a folder that it does not search, nothing changes.
if [ "$action" != portable ] && [ -z "$DESTDIR" ] && [ "$(id -u)" = 0 ]; then
    PATH="$PATH:/usr/sbin:/sbin" ldconfig # root's PATH lacks them after a bare su
fi
