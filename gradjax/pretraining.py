"""Greedy training of one hidden layer after the other, before the labels are used."""

METHODS = {"none": None}
