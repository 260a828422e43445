"""Answers that are what a constraint says: JSON of a schema, a regex, a choice, a tool call.

    Constraint ── sources: checked, as one text ──> trial: compiled once where it may fail
               ── grammar: compiled, kept ──> Matcher, one a sequence: mask, accept, mask, ...

The automata are llguidance's. Compiling is for worker threads; a mask takes tens of microseconds.
"""
