"""Examples for the demo's adapters: what a user writes, and the answer the adapter learns.

Every maker takes its random generator, so a seed gives the same examples. The data packages are
imported by name when they are needed: jlorax itself runs without them.
"""
