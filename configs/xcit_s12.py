"""XCiT-S12 on ImageNet, L-inf 4/255, one step from a random start, 110 epochs.

    jaxrobust train --config configs/xcit_s12.py

The light recipe (Debenedetti et al. 2022, arXiv 2209.07399): the row `xcit_s12` of
`configs/light_recipe.py`, which says what is published of it and what differs. Hardware, wall time,
accuracies: not yet measured.
"""

from configs import light_recipe

SOURCES = light_recipe.SOURCES


def get_config():
    return light_recipe.get_config("xcit_s12")
