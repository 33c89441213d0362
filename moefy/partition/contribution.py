from moefy.partition.kmeans import kmeans

contribution = kmeans
