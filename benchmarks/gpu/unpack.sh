#!/usr/bin/env bash
# What pack.py has packed, into the places that it had there: bash benchmarks/gpu/unpack.sh FOLDER
set -eu
folder=$(realpath "$1")
cd "$(dirname "$0")/../.."
cat "$folder"/part-* | xz -d --memlimit=2GiB | tar x
