// Adds the rows of each chain in the order of their places: the first place of an id does the work, so no atomics.
// The table was filled with zeros before.
{# Inside: place and n are below count, and so are the links that are followed; links has 2 count elements, dy count rows, and used covers the
   columns of both dy and the table; the id is clamped. #}
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
    var sum = vec4<f32>();
    for (var n = place; n < {{ count }}u; n = links_at(n)) {
        sum += dy_load(n * dy_stride + col);
    }
    table_store(min(ids_at(place), {{ vocabulary - 1 }}u) * table_stride + col, sum);
}
