#!/usr/bin/env bash
# Installs the pinned packages with the pip that comes first on PATH. `make setup` runs it in the virtual environment.
# TORCH names torch's build as its version does (cpu, cu126, rocm7.2); "default" is the one that pip takes by itself.
# EXTRAS names extras of pyproject.toml, by default dev.
# If TORCH is empty, Linux without an NVIDIA GPU gets cpu, because pip's default there is a CUDA build of gigabytes.
set -euo pipefail
torch=$(grep '^torch==' constraints.txt)
count=$(sed '/^# The packages of the extras/,$d' constraints.txt | grep -c ==)

gpu() { [ "$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null || compgen -G '/dev/nvidia*' >/dev/null; }

# Shows pip's output as one changing line on a terminal, and elsewhere only that it unpacks.
progress() {
    local line packages=0 terminal=
    [ ! -t 1 ] || terminal=yes
    while IFS= read -r line; do
        case $line in
        Collecting* | Processing*) packages=$((packages + 1)) line=${line#* } ;;
        *.whl\ \(*) line=$(sed -E 's/.*[ /]([^ /-]+)-([^-]+)-.*whl/\1 \2/' <<<"$line") ;;
        Installing*) line="Unpacking them takes a minute or two." && [ $terminal ] || echo "$line" ;;
        *) continue ;;
        esac
        [ ! $terminal ] || printf '\r%-79.79s' "$packages of $count: $line"
    done
    [ ! $terminal ] || [ $packages = 0 ] || echo
}

asked=${TORCH:-}
build=${asked:-$(gpu && echo default || echo cpu)}
installed=$(python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' 2>/dev/null || true)
if [ ! "$installed" ]; then
    echo "Installing $count packages, once; besides torch they are 0.3 GB to download and 1.2 GB on disk."
    echo "torch: the build \"$build\"$([ "$asked" ] || [ $build = default ] || echo " (200 MB), as no NVIDIA GPU is found")." \
        "For another one: rm -rf .venv && make setup TORCH=default (or cpu, cu126, rocm7.2)"
fi
if [ "$build" != default ] && [ "$installed" != "$torch+$build" ]; then
    # pip's own configuration may name a place that has it; if not, uv knows PyTorch's.
    if pip install --dry-run --quiet --no-deps "$torch+$build" &>/dev/null; then
        pip install --no-compile --no-deps "$torch+$build"
    else
        pip install --quiet --constraint constraints.txt uv
        if ! uv pip install --no-deps --torch-backend "$build" "$torch"; then
            echo "$torch+$build cannot be downloaded: set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to a place that has it," \
                "or take pip's default: make setup TORCH=default" >&2
            [ ! "$asked" ] || exit 1
            echo "pip's default, gigabytes with CUDA, follows in 10 seconds; Ctrl-C prevents it." >&2
            sleep 10
        fi
    fi
fi
PYTHONUNBUFFERED=1 pip install --no-compile --constraint constraints.txt ".[${EXTRAS:-dev}]" | progress
# pip would compile on one core, which takes as long as its other work. What comes later is compiled when it is used.
[ "$installed" ] || python -m compileall -q -j 0 "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" &>/dev/null || true
