"""Networks of a study of architectures at 32 px, searched cells, and further objectives.

Source of the study: Tang et al. 2022, "Exploring the Relationship between Architecture and
Adversarially Robust Generalization" (arXiv 2209.14105). Its networks were never published; which
public code each of them is was found by counting parameters and is in its file. Rows that end in
_224 are ours. Parity: tests/zoo, of each against golden logits of that code.
"""
