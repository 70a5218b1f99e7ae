"""How the embedded base is trained, stage by stage."""
