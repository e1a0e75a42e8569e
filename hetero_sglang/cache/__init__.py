"""The device areas of a request's KV and their host copy.

Owns the resident, staging and block pools, the host store's bookkeeping and the rows in
flight. Knows token ids, positions, blocks and pages; never imports SGLang.
"""
