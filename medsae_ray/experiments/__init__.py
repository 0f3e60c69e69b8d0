"""The paper's experiments as commands: each fits SAEs by Ray Tune, measures them and writes a table, a figure
and a paragraph of plain words into the run."""
