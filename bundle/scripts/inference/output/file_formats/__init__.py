"""Writers of finished predictions in files of other programs, one file format each."""
