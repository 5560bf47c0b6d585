// Adds up rows of equal ids that lie side by side, {{ each }} rows an invocation and vec4 of columns. A sum that lies between two other ids is
// complete and goes to the table, which was filled with zeros before. Those at the two ends of a block may go on in its neighbours: they are
// left as two rows, which the same kernel adds up, until one block is all.
{# Inside: block < blocks and col < used; rows read lie below the end of a block, at most count. Places were made by the sort, below count, and
   an id is clamped to the table. A block leaves its two rows, 2 block and 2 block + 1. #}
{% include "shared/group" %}

fn id_at(i: u32) -> u32 {
{% if from_parts %}
    return keys_at(i);
{% else %}
    return ids_at(places_at(i));
{% endif %}
}

fn row_at(i: u32, col: u32) -> vec4<f32> {
{% if from_parts %}
    return parts_load(i * parts_stride + col);
{% else %}
    return dy_load(places_at(i) * dy_stride + col);
{% endif %}
}

fn complete(id: u32, col: u32, sum: vec4<f32>) {
{% if padding >= 0 %}
    if (id == {{ padding }}u) {
        return;
    }
{% endif %}
    table_store(min(id, {{ vocabulary - 1 }}u) * table_stride + col, sum);
}

{% if blocks > 1 %}
fn leave(row: u32, id: u32, col: u32, sum: vec4<f32>) {
    if (col == 0u) {
        next_keys_put(row, id);
    }
    next_parts_store(row * next_parts_stride + col, sum);
}
{% endif %}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let i = group_id(wid) * {{ size }}u + lid;
    let col = i % {{ used }}u;
    let block = i / {{ used }}u;
    if (block >= {{ blocks }}u) {
        return;
    }
    let begin = block * {{ each }}u;
    let end = min(begin + {{ each }}u, {{ count }}u);
    var id = id_at(begin);
    var sum = vec4<f32>();
    var at_begin = true;
    for (var i = begin; i < end; i++) {
        let next = id_at(i);
        if (next != id) {
{% if blocks > 1 %}
            if (at_begin) {
                leave(2u * block, id, col, sum);
            } else {
                complete(id, col, sum);
            }
{% else %}
            complete(id, col, sum);
{% endif %}
            at_begin = false;
            id = next;
            sum = vec4<f32>();
        }
        sum += row_at(i, col);
    }
{% if blocks > 1 %}
    if (at_begin) {
        leave(2u * block, id, col, sum);
        sum = vec4<f32>();
    }
    leave(2u * block + 1u, id, col, sum);
{% else %}
    complete(id, col, sum);
{% endif %}
}
