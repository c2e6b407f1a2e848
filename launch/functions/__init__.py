"""Runs and verbs as functions of Python, which ``decoct`` hands on: ``decoct.run``, ``decoct.distill`` and the others."""
