"""Tests whether a network, or a config, has one of the usual faults: `jaxrobust doctor`.

patient          a network with its images, and what is measured on it, once each
explanations     what done to the images or labels would raise its accuracy
network_checks   the table of checks of a network
config_checks    the table of checks of a config
findings         what a row of a table is, and how its result is told
"""
