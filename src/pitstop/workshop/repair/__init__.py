"""A finished adapter that forgets, to the least change of it that passes the gate.

pairs.py     the adapter's factors, read and written as PEFT's files
edits.py     pure functions from such factors to others: scale, parts, depth ramp, rank, projection
parts.py     which modules, layers and heads there are
material.py  what is measured: items the search sees, items only the verdict sees
screen.py    gradients, activations and losses on general text: what is worth measuring exactly
points.py    one candidate measured: damage against task
search.py    candidates measured once each, halving of scales, comparison with the uniform one
explore.py   the way through them: uniform scales, a look at other shapes, the best of each exactly
judge.py     which candidate is tried on the verdict's items, and what the gate says of it
result.py    `repair.json`, and the table
page.py      `repair.html`
repair.py    the stage
"""
