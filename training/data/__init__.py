"""Videos to clips: import what you need from the modules of this package.

``reader`` opens one video, ``sampling`` chooses its frames, ``transforms`` turns frames into
network input, ``dataset`` puts the three together over a folder, ``scan`` finds files that cannot
be used, ``synthetic`` writes videos of the generated task. Nothing is imported here: the child
processes of the scan import this package and must start without torch.
"""
