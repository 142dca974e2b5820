"""Queries translated by a chat endpoint: asked, judged, kept in a journal. The command is conan_engine/translate.py."""
