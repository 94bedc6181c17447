"""Floor 0: errors, strict configs, atomic files, seeds, the machine, and the tracking store of a
run.
"""
