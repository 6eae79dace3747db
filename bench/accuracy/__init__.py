"""Does amplification help? The experiment that chooses the defaults, in stages.

A trick is guilty until proven: it has to gain over a tuned learning rate and weight decay, and over
layers chosen by lot, on fresh seeds. `runs` says what one run is and runs it, `store` keeps what
came of it, `stages` says which runs are wanted next, `budget` runs them while there is time,
`repeatability` and `statistics` judge, `report` and `figures` show.
"""
