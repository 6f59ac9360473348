"""A small trained world of drawn characters (Open Peeps by Pablo Stanley, CC0) at 64 px.

A character is five parts that no prompt names: hair, skin, hair colour, glasses, beard. A prompt names what an artist edits:
expression, clothes, ground, pattern, style, place. So both what the gate keeps and what the text changes can be counted.
"""
