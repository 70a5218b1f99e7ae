"""The training recipe of the embedded base: one module for each stage, and what the stages share."""
