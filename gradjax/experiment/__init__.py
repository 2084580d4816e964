"""The laboratory: configs, models, tasks, and the programs that train them over seeds and
settings.
"""
