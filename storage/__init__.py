"""The cache: manifest, shard layout, codes, writer and readers. Imports no model code and no other folder of ours."""
