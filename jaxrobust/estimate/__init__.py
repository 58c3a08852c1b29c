"""What a run will cost before it runs: hours, chip-hours, memory and money of every phase.

`changes` reads the config and `target` the devices, `work` says how much there is to do, `here`
measures it on devices that are present, `elsewhere` computes it for those that are not, `attacked`
does both for AutoAttack, `account` adds it up, and `page` prints it.
"""
