"""What a run is watched for, one file each; the file name is the key."""
