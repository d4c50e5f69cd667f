"""What `stepengine.viz.narrate` is made of: the scene of one step, and the sentences about its blocks."""
