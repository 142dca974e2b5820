"""The house as CONTRIBUTING.md draws it is that of the imports, and what breaks its rules is named."""

import subprocess
import sys

import rooms


def test_the_drawing_is_that_of_the_imports():
    done = subprocess.run([sys.executable, rooms.__file__, "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_imports_of_every_form_are_seen():
    graph = rooms.imports()
    # from a package, its module
    assert {"conan_engine/run/checkpoint.py", "conan_engine/stages/__init__.py"} <= set(graph["conan_engine/train.py"])
    assert "kernels/attention/launch.py" in graph["kernels/attention/api.py"]  # within a function
    assert "csrc/bindings.cpp" in graph["conan_engine/data/shards.py"]
    assert "csrc/shards/reader.h" in graph["csrc/batches/plan.h"]


def test_what_leads_upwards_and_a_circle_are_named():
    graph = rooms.imports()
    assert list(rooms.mistakes(graph)) == []
    upwards = graph | {"conan_engine/data/units.py": ["conan_engine/model/losses.py"]}
    assert list(rooms.mistakes(upwards)) == [
        "conan_engine/data/units.py imports conan_engine/model/losses.py, which leads upwards: model "
        "stands no lower than data"
    ]
    level = graph | {"conan_engine/negatives/pools.py": ["conan_engine/settings/rules.py"]}
    assert len(list(rooms.mistakes(level))) == 1
    round_about = graph | {"conan_engine/run/pieces.py": ["conan_engine/run/saving.py"]}
    (said,) = rooms.mistakes(round_about)
    assert said.startswith("a circle: ") and "conan_engine/run/saving.py -> conan_engine/run/" in said
    assert list(rooms.mistakes(graph | {"conan_engine/new/file.py": []})) == [
        "conan_engine/new/file.py: its room 'new' is on no floor; give it one in FLOORS"
    ]
