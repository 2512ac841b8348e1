#!/usr/bin/env bash
# Builds vision_msgs and tf2_msgs, which are not on PyPI, into the virtual environment that is given:
#     ros2_ws/interfaces/build.sh .venv-ros
# Not for a ROS installation: there, install ros-<distro>-vision-msgs and ros-<distro>-tf2-msgs.
set -euo pipefail

venv=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv" AMENT_PREFIX_PATH="$venv" CMAKE_PREFIX_PATH="$venv"

# The wheels' CMake files hold the paths of the machine that built them.
include=$(python -c "import sysconfig; print(sysconfig.get_path('include'))")
numpy=$(python -c "import numpy; print(numpy.get_include())")
{ grep -rlE '/opt/python/cp3' "$venv/share" --include='*Export.cmake' || true; } | xargs -r sed -i -E \
    "s#/opt/python/cp3[0-9]+-cp3[0-9]+/lib/python3\.[0-9]+/site-packages/numpy/_core/include#$numpy#g; \
     s#/opt/python/cp3[0-9]+-cp3[0-9]+/include/python3\.[0-9]+#$include#g"

for package in tf2_msgs vision_msgs; do
    if python -c "import $package.msg" 2>/dev/null; then
        continue
    fi
    echo "building $package"
    cmake -G Ninja -S "$here/$package" -B "$build/$package" -DCMAKE_INSTALL_PREFIX="$venv" \
        -DBUILD_TESTING=OFF > "$build/$package.log" 2>&1 || { tail -30 "$build/$package.log"; exit 1; }
    ninja -C "$build/$package" -j1 install > "$build/$package.log" 2>&1 || { tail -30 "$build/$package.log"; exit 1; }
done
