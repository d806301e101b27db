"""Stands in for the package that only Colab has, so that a chapter's copy meets it in the tests."""
