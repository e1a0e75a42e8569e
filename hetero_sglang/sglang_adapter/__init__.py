"""Everything that knows SGLang: flags, refusals, pools, attention backend, state.

The only package that imports ``sglang``. Importing it is cheap; modules that need heavy
parts of SGLang are imported when the policy is switched on.
"""
