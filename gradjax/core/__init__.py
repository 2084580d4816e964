"""What everything else rests on: exact scaling, the step protocol, activation functions,
initialisers.
"""
