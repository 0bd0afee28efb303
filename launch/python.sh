#!/usr/bin/env bash
# Find a CPython that the pinned wheels support and print its path.
#
#   launch/python.sh                 search PATH, pyenv's versions, then uv
#   PYTHON=/path launch/python.sh    check this one and no other
#
# Supported: CPython 3.12 (the tests' own) and 3.13, not free-threaded, with venv and ensurepip.
# megatron-core 0.19 needs 3.12 and has binary wheels for these two. Exit status 1 with an
# explanation on stderr when there is none. Only bash built-ins, so that it works with an empty PATH.
set -euo pipefail

versions=(3.12 3.13) # in order of preference
range='>=3.12,<3.14' # the same, as uv wants it
wanted='CPython 3.12 or 3.13 (not free-threaded)'

# Prints the path of the base interpreter (also from within a virtual environment or a shim).
probe='
import sys, sysconfig
if sys.implementation.name != "cpython" or not (3, 12) <= sys.version_info[:2] < (3, 14):
    sys.exit(3)
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit(3)
try:
    import ensurepip, venv
except ImportError:
    print("%d.%d" % sys.version_info[:2])
    sys.exit(4)
print(getattr(sys, "_base_executable", None) or sys.executable)
'

without_venv='' # "PATH VERSION" of the first good interpreter that lacks only ensurepip or venv

# try CANDIDATE: print its path and succeed if it is good; else return the probe's status.
try() {
    local found status=0
    found=$("$1" -I -c "$probe" 2>/dev/null) || status=$?
    if ((status == 0)); then
        printf '%s\n' "$found"
    elif ((status == 4)) && [[ -z $without_venv ]]; then
        without_venv="$1 $found"
    fi
    return "$status"
}

explain_missing_venv() {
    local path=${without_venv% *} version=${without_venv##* }
    printf '%s\n' \
        "launch/python.sh: $path is a CPython $version, but its venv or ensurepip module is missing." \
        "On Debian and Ubuntu install it with: apt-get install python$version-venv" >&2
}

if [[ -n ${PYTHON:-} ]]; then
    status=0
    try "$PYTHON" || status=$?
    if ((status == 0)); then exit 0; fi
    if ((status == 4)); then
        explain_missing_venv
    else
        printf '%s\n' \
            "launch/python.sh: PYTHON=$PYTHON is not usable: it must name a runnable $wanted." \
            "Point PYTHON at another interpreter, or unset it to let this script search." >&2
    fi
    exit 1
fi

home=${HOME:-/nonexistent}

for version in "${versions[@]}"; do
    while IFS= read -r candidate; do
        if try "$candidate"; then exit 0; fi
    done < <(type -aP "python$version" || true)
done
while IFS= read -r candidate; do
    if try "$candidate"; then exit 0; fi
done < <(type -aP python3 || true)

for version in "${versions[@]}"; do
    for candidate in "${PYENV_ROOT:-$home/.pyenv}"/versions/"$version".*/bin/python"$version"; do
        if [[ -x $candidate ]] && try "$candidate"; then exit 0; fi
    done
done

for uv in "$(type -P uv || true)" "$home/.local/bin/uv" "$home/.cargo/bin/uv"; do
    if [[ ! -x $uv ]]; then continue; fi
    candidate=$("$uv" python find --system "$range" 2>/dev/null) || candidate=''
    if [[ -z $candidate ]]; then
        printf '%s\n' "launch/python.sh: found no $wanted; asking $uv to install one." >&2
        "$uv" python install "${versions[0]}" >&2 || continue
        candidate=$("$uv" python find --system "$range" 2>/dev/null) || continue
    fi
    if try "$candidate"; then exit 0; fi
done

if [[ -n $without_venv ]]; then
    explain_missing_venv
else
    printf '%s\n' \
        "launch/python.sh: found no $wanted, which this project needs." \
        "Looked on PATH, in pyenv's versions and for uv. Any one of these helps:" \
        "  - Debian 13, Ubuntu 24.04:  apt-get install python3 python3-venv" \
        "  - pyenv:                    pyenv install ${versions[0]}" \
        "  - uv:                       install uv (https://docs.astral.sh/uv/) and try again" \
        "  - one you have elsewhere:   PYTHON=/path/to/python${versions[0]} make ..." >&2
fi
exit 1
