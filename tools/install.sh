#!/usr/bin/env bash
# Installs the pinned packages for the python that comes first on PATH. `make setup` runs it in the virtual environment.
# TORCH names torch's build as its version does (cpu, cu126, rocm7.2); "default" is the one that PyPI has.
# EXTRAS names extras of pyproject.toml, by default dev.
# If TORCH is empty, Linux without an NVIDIA GPU gets cpu, because the default there is a CUDA build of gigabytes.
set -euo pipefail
torch=$(grep '^torch==' constraints.txt)
count=$(sed '/^# The packages of the extras/,$d' constraints.txt | grep -c ==)
rest=(--constraint constraints.txt ".[${EXTRAS:-dev}]")

gpu() { [ "$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null || compgen -G '/dev/nvidia*' >/dev/null; }

asked=${TORCH:-}
build=${asked:-$(gpu && echo default || echo cpu)}
installed=$(python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' 2>/dev/null || true)
if [ ! "$installed" ]; then
    echo "Installing $count packages, once; besides torch they are 0.3 GB to download and 1.2 GB on disk."
    echo "torch: the build \"$build\"$([ "$asked" ] || [ $build = default ] || echo " (200 MB), as no NVIDIA GPU is found")." \
        "For another one: rm -rf .venv && make setup TORCH=default (or cpu, cu126, rocm7.2)"
fi
pip install --quiet --constraint constraints.txt uv || true # it installs in seconds what takes pip minutes
if [ "$build" != default ] && [ "$installed" != "$torch+$build" ]; then
    # pip's own configuration may name a place that has it; if not, uv knows PyTorch's.
    if pip install --dry-run --quiet --no-deps "$torch+$build" &>/dev/null; then
        pip install --no-compile --no-deps "$torch+$build"
    elif ! uv pip install --system-certs --python "$(command -v python)" --no-deps --torch-backend "$build" "$torch"; then
        echo "$torch+$build cannot be downloaded: set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to a place that has it," \
            "or take the default: make setup TORCH=default" >&2
        [ ! "$asked" ] || exit 1
        echo "The default, gigabytes with CUDA, follows in 10 seconds; Ctrl-C prevents it." >&2
        sleep 10
    fi
fi
# uv prints a line for each package: something to watch on a terminal, and too much for a log.
[ -t 2 ] || quiet=--quiet
# pip knows its user's mirrors and proxies, as uv does not.
uv pip install --system-certs --python "$(command -v python)" ${quiet:-} "${rest[@]}" || pip install --quiet --no-compile "${rest[@]}"
