"""Times of single operations, against torch on the same inputs and against the memory's speed.

Every benchmark holds a result against the reference before it is timed and reports nothing if that
fails. Layers follow one another with pools of their own, as in a model, so caches do not flatter.
"""
