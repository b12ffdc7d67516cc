"""Scores of attention as expressions of (batch, head, query, key), and what they leave out.

``expr`` builds them, ``evaluate`` says what they mean, ``tiles`` which tiles of the score matrix
are empty, ``patterns`` what people call them.
"""
