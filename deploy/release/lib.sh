# What the scripts of a release share; for `source`.
set -euo pipefail
umask 022
export LC_ALL=C TZ=UTC SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-0}

missing() { # missing WHAT PACKAGE
    echo "missing: $1; Debian: apt install $2" >&2
    exit 1
}

# The same files give the same bytes: names are sorted, owners are root, times are SOURCE_DATE_EPOCH.
archive() { # archive FOLDER NAME...: a compressed tar of these in FOLDER, on stdout
    tar --create --directory="$1" --format=gnu --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 \
        --numeric-owner --mode=u=rwX,go=rX --dereference "${@:2}" | gzip --no-name -9
}
