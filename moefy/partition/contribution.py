from moefy.partition.kmeans import kmeans as contribution
