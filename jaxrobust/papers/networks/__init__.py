"""What Debenedetti's thesis looks at in addition to accuracies, for any network of ours.

Each analysis is one file: numbers as rows of a CSV, and the picture that is drawn from them.
"""
