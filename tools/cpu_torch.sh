#!/usr/bin/env bash
# Install the CPU build of PyTorch where the package index's own build would bring gigabytes of CUDA and there is no GPU.
#
#   tools/cpu_torch.sh PYTHON
#
# That is on Linux, without an NVIDIA GPU, if pip's dry run collects nvidia packages. Anywhere else this installs nothing
# and asks nobody. The dry run is stopped at the first of them, since it would go on and download what it has collected.
set -eu

python=$1
cpu_builds=https://download.pytorch.org/whl/cpu
pin=$(sed -n 's/^torch==//p' constraints.txt)
of_torch='from importlib.metadata import version; print(version("torch").partition("+")[0])'

install() {
  "$python" -m pip install --disable-pip-version-check --root-user-action=ignore --no-color --progress-bar off "$@"
}

[ "$(uname -s)" = Linux ] || exit 0
[ "$("$python" -c "$of_torch" 2> /dev/null)" != "$pin" ] || exit 0
! nvidia-smi > /dev/null 2>&1 || exit 0
install --dry-run "torch==$pin" -c constraints.txt 2> /dev/null | grep -q '^ *Collecting nvidia' || exit 0

echo "there is no NVIDIA GPU: taking the CPU build of PyTorch from $cpu_builds"
install --quiet --no-deps --index-url "$cpu_builds" "torch==$pin" 2> /dev/null ||
  echo "it cannot be had from there: the build with CUDA comes instead, several gigabytes" >&2
