"""Random programs with state: a small language, what it means, and JAX's answer to compare.

- `syntax`: the language, and how a person reads it.
- `programs`: hypothesis strategies that make programs whose meaning is beyond doubt.
- `interpreter`: what a program means, in NumPy, ignorant of JAX.
- `runner`: the program as JAX and storax run it.
"""
