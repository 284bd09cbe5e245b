"""DeBERTa v1, v2 and v3 in plain torch, for one device, under the published parameter names.

Nothing here knows of processes; other rooms cut these models by swapping submodules and keeping layers.
Empty, so that reading a configuration does not import torch.
"""
