// Adds the rows of each chain in the order of their places: the first place of an id does the work, so no atomics.
// The table was filled with zeros before. An invocation takes at most {{ count }} rows, see `kernels/embedding.rs` for the bound.
{% include "shared/group" %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let i = group_id(wid) * {{ size }}u + lid;
    let col = i % {{ used }}u;
    let place = i / {{ used }}u;
    if (place >= {{ count }}u) {
        return;
    }
    if (links_at({{ count }}u + place) == 0u) {
        return;
    }
    // Eight rows, eight sums of them, eight of those, and what that comes to.
    var sum0 = vec4<f32>();
    var sum1 = vec4<f32>();
    var sum2 = vec4<f32>();
    var sum3 = vec4<f32>();
    var rows = 0u;
    for (var n = place; n < {{ count }}u; n = links_at(n)) {
        sum0 += dy_load(n * dy_stride + col);
        rows += 1u;
        if (rows % 8u == 0u) {
            sum1 += sum0;
            sum0 = vec4<f32>();
            if (rows % 64u == 0u) {
                sum2 += sum1;
                sum1 = vec4<f32>();
                if (rows % 512u == 0u) {
                    sum3 += sum2;
                    sum2 = vec4<f32>();
                }
            }
        }
    }
    let sum = (sum0 + sum1) + (sum2 + sum3);
    table_store(min(ids_at(place), {{ vocabulary - 1 }}u) * table_stride + col, sum);
}
