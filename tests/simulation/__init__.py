"""An independent simulation of the method: full-cache attention with one mask per KV head.

It shares no code with the plugin, the kernels or memd. Nothing is evicted, moved or fetched here;
a head that "lost" a position merely may not look at it. What a server with real pools and a real
second process answers must be what this computes, token for token.
"""
