"""Export a run for other software: `python -m conan_engine.export RUN FOLDER`."""
