"""Runs as other software loads them: `python -m conan_engine.export RUN FOLDER`."""
