"""Videos to clips: import what you need from the modules of this package.

| question | module |
|---|---|
| how is a video file, or a folder of images, read | ``reader``, ``reader_av``, ``frame_folders`` |
| what if a decoder hangs or crashes | ``child``, ``child_process``; all files at once: ``scan`` |
| which frames make a clip | ``samplers``, ``samplers_segments``, ``sampling`` |
| how are training clips scaled, cut, mirrored | ``augment`` |
| which windows does a test look at | ``crops`` |
| how are frames scaled, how do levels become input | ``resizing``, ``colours``; done: ``views`` |
| which lists and annotation files are understood | ``lists``, ``annotations``, ``lmdb_list`` |
| what is a data set | ``dataset``; of a folder: ``folder``, of a list: ``listed`` |
| how are lists, frames and flow made | ``prepare``, ``flow`` |
| the generated task | ``synthetic`` |

Nothing is imported here: decoding processes import this package and must start without torch.
"""
