#!/usr/bin/env bash
# The loader under GCC's sanitizers: its tests with AddressSanitizer and UndefinedBehaviorSanitizer, then with
# ThreadSanitizer, and a fuzzer over real shards. `make sanitize` runs it; everything is built below build/sanitize.
set -eu
cd "$(dirname "$0")/../.."
PYTHON=$(realpath -s "${PYTHON:-.venv/bin/python}")
CASES=${CASES:-100000}
CXX=${CXX:-c++}
out=$PWD/build/sanitize
python_says() { "$PYTHON" -c "import pybind11, sysconfig; print($1)"; }
flags="-std=c++17 -O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all"
includes="-I csrc -isystem $(python_says 'pybind11.get_include()') -isystem $(python_says 'sysconfig.get_path("include")')"
library() { "$CXX" -print-file-name="$1.so"; }

tests() { # name, -fsanitize=, what to preload
    echo "== tests under $2"
    rm -rf "$out/$1" && mkdir -p "$out/$1"
    cp -r conan_engine "$out/$1"
    rm -f "$out/$1"/conan_engine/_loader*.so
    $CXX $flags $includes -fsanitize="$2" -fPIC -shared -fvisibility=hidden csrc/*.cpp csrc/*/*.cpp -o "$out/$1/conan_engine/_loader$(python_says 'sysconfig.get_config_var("EXT_SUFFIX")')"
    # from that folder, or the package beside tests/ comes first; setarch: ThreadSanitizer wants its memory where address
    # randomisation may put something else
    local run=(env OMP_NUM_THREADS=1 PYTHONPATH="$out/$1" LD_PRELOAD="$3" setarch -R "$PYTHON")
    (
        tests=$PWD/tests/data
        cd "$out/$1"
        "${run[@]}" -c "from conan_engine import _loader; assert _loader.__file__.startswith('$out/$1/'), _loader.__file__"
        "${run[@]}" -m pytest -q -p no:cacheprovider "$tests"/test_{shards,shard_writer,damaged_shards,loader}.py
    )
}

# Python itself leaks and quarantined memory looks like a leak; SIGBUS is ours, see csrc/shards/sigbus.h
export ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0:quarantine_size_mb=1 UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1:exitcode=66
tests address address,undefined "$(library libasan):$(library libstdc++)"
tests thread thread "$(library libtsan)"

echo "== fuzzer"
"$PYTHON" tests/csrc/write_shards.py "$out/shards"
$CXX $flags -I csrc -fsanitize=address,undefined tests/csrc/fuzz_shards.cpp csrc/batches/{batch,plan}.cpp csrc/shards/{reader,crc32c,widen,sigbus}.cpp -o "$out/fuzz_shards" -pthread
shards=("$out"/shards/*/shard-00000.tokens)
for shard in "${shards[@]}"; do
    echo "${shard#"$out"/}"
    "$out/fuzz_shards" "$shard" "$out/spoilt" $((CASES / ${#shards[@]} + 1)) "${SEED:-$RANDOM}"
done
