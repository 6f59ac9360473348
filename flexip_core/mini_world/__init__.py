"""A procedural world of 16 px pictures, small enough to train base, encoders and adapters on one CPU core, and large enough to
show whether the gate works: subjects whose look no caption describes, in places that captions do describe.
"""
