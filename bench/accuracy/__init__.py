"""Does amplification help? The experiment that chooses the defaults, in stages.

A trick is guilty until proven: it has to gain over a tuned learning rate and weight decay, and over
layers chosen by lot, on fresh seeds. `train`, `data`, `models` and `controls` make one run; `runs`
says what a run is, `store` keeps what came of it, `stages` says which runs are wanted next, `work`
runs them while there is time, `repeatability` and `statistics` judge, `report` and `figures` show.
`demo` is one plain and one amplified run to look at.
"""
