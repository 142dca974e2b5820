"""Queries translated by a chat endpoint: asked, checked, kept in a journal. The command is
conan_engine/translate.py.
"""
